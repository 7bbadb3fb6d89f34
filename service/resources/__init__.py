"""The resources: each translates HTTP for one path and delegates."""
