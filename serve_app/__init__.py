"""The room of the Ray Serve sampling application.

Until it moves in, completions come from the training actor (`actors.completion` over
`actors.generation.SamplingEngine`), which is the class that its replicas will host.
"""
