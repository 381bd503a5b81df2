"""Models: what a model says about itself, the registry that keeps them, the ones we ship."""
