module nomad.dev/tests/toolbox

go 1.26.0
