"""Model files: loading them onto a device, making new ones, and trying whether a model works.

Everything is read from a local folder, and code in that folder runs only if the load options say so. A folder that
`convert`, `pickles` or `quantize` makes exists complete or not at all. Errors of libraries leave this room as
ServiceErrors whose messages say what to do.
"""
