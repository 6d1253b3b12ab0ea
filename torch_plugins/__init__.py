"""The mathematics of every feature, in torch and the standard library only."""
