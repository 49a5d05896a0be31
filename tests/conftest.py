"""One thread for all tests: the models are tiny, and OpenMP threads that wait for a busy core cost ten times the work.

Set before anything is captured, since Dynamo guards on it.
"""

import torch

torch.set_num_threads(1)
