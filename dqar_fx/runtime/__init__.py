"""What changes between the calls of an optimised model: identity, stored values, programs, counts."""
