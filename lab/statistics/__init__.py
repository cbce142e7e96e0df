"""Statistics that claims share: rank correlation, permutation tests, autocorrelation along depth."""
