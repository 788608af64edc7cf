"""EngineCore, its process, and the clients that front ends talk to it through."""
