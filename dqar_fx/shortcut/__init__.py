"""Calls past Dynamo's guards on the model, for as long as the model is what they passed on."""
