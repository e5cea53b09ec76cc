"""How the posterior is found, one module an algorithm."""
