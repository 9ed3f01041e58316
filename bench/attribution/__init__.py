"""How wrong is the energy that a request is told? Joulegate and its peers against a simulated GPU whose truth is known.

Everything here is simulated; nothing is measured on hardware. `docs/accuracy.md` says how to read the table.
"""
