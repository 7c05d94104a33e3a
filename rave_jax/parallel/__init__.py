"""Hosts, meshes and sharding rules."""
