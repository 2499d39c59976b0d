"""From the model field to a replica that answers."""
