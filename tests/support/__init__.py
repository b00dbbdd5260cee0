"""What several test modules or the benchmarks need: judges, networks, pictures, and how to run what is tested."""
