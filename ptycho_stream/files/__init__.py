"""Files that people bring and take home, one format a module."""
