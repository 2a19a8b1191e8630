"""The AnySat model in plain PyTorch and its weights; knows no xarray and no dask.

``anysat`` imports torch, so nothing here is imported before it is used.
"""
