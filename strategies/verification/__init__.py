"""`distplat verify`: comparison of runs with independent plain torch loops."""
