"""The page for browsers: what it is sent, what it may ask, and the files it is made of."""
