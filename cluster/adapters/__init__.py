"""The border: adapters and their base model are read here, or refused by name."""
