"""The `lutserve::` operators: reference, fake and schema in one module each, C++ in `cpu/`."""
