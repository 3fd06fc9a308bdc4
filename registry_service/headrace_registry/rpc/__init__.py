"""gRPC: servicers that check, call the core and fill the answer; conversions; the table of errors."""
