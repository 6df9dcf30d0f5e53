"""HTTP: routes, problem documents, identity of the caller, server-sent events, the OpenAPI document."""
