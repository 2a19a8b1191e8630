"""Small helpers that every other package may use. Imports nothing of xr_anysat but `errors` and `config`."""
