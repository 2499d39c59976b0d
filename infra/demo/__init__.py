"""The main job in one go, on the adapters that this repository ships."""
