"""Priors: the sites of a NumPyro function, read from one trace, and the code z that they make up."""
