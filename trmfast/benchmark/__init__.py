"""The main job: one supervision step and one training step of the published models, timed against eager PyTorch."""
