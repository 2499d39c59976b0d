"""The Ray Serve application: an OpenAI-compatible router in front of engines that hold whole clusters."""
