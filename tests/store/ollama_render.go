// Renders chat templates as Ollama does, with Go's own text/template: JSON on stdin, JSON on stdout.
//
//	go run tests/runtime/ollama_render.go < cases.json
//
// Input: {"template": TEXT, "cases": [{"think": BOOL, "messages": [{"role", "content", "thinking"}]}]}.
// Output: a list of texts. What a template of Ollama sees: .Messages, .System, .Think, .IsThinkSet, .Tools.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role, Content, Thinking string
}

type input struct {
	Template string
	Cases    []struct {
		Think    bool
		Messages []*message
	}
}

func main() {
	var in input
	check(json.NewDecoder(os.Stdin).Decode(&in))
	parsed, err := template.New("").Option("missingkey=zero").Parse(in.Template)
	check(err)
	out := []string{}
	for _, one := range in.Cases {
		var text strings.Builder
		check(parsed.Execute(&text, map[string]any{
			"Messages": one.Messages, "System": "", "Response": "", "Tools": nil,
			"Think": one.Think, "IsThinkSet": true,
		}))
		out = append(out, text.String())
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", " ")
	check(encoder.Encode(out))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
