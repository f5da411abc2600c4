"""The pure heart of Flyball: no clock, no I/O, no asyncio, standard library only."""
