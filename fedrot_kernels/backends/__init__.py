"""One module a backend; each only registers its implementations of the operators."""
