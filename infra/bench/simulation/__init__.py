"""A simulated fleet of many adapters on few devices."""
