import torch

torch.set_num_threads(1)  # as launch sets it in each rank: bit-equality on a CPU includes the number of threads
