"""How a step runs on hardware."""
