"""What tests share: cubes, servers, weights and processes."""
