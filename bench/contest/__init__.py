"""How caches for diffusion transformers are compared: models, contenders, a process for each, and the race."""
