module github.com/portd/portd/clients/go

go 1.19
