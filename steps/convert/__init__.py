"""Steps that turn one kind of checkpoint into another."""
