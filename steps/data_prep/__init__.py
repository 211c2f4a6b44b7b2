"""Steps that turn data into what a trainer reads."""
