"""Tools over the engines that serve: `bench`, `ort-tune`, `quantize`. Each is a process of its own; a replica imports nothing from here."""
