"""Graph passes: ``fx.GraphModule`` in, ``fx.GraphModule`` out."""
