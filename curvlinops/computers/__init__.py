"""How Kronecker factors are gathered: collectors, statistics, the table of layers."""
