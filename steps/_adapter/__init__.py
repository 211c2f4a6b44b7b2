"""What ``nemotron adapter`` runs: adapters verified, compared, written in another layout."""
