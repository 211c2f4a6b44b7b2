"""Chat conversations in, packed Parquet rows with an assistant-only loss mask out."""
