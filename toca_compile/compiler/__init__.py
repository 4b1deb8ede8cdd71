"""From a graph and a plan to callables: the pipeline of passes, the check of plans, variants, costs."""
