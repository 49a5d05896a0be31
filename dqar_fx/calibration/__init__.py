"""Choosing a plan by measurement: what each reuse would do to the final sample, and the plan that saves most for it."""
