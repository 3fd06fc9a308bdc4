"""Rows as chunks of numpy views and as batches of tensors, from streams that outlive their connections.

Only `tensors` and `tables` need torch.
"""
