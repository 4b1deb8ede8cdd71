"""How the graphs of a call, as Dynamo hands them over, are run to be traced."""
