"""The network architectures. A registry model names one of them; the predictor runs it."""
