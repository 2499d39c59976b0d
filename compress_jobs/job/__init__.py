"""The main job and its steps."""
