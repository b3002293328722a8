"""Each rule of check_style finds what it is there for, and nothing else."""

import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import check_style  # noqa: E402


def messages(path, text):
    return [finding.message for finding in check_style.check_file(pathlib.Path(path), text)]


def function_lengths(code):
    blanked = check_style.blank_comments_and_strings(code)
    return [(name, lines) for name, _, lines in check_style.cpp_functions(blanked)]


class RulesTest(unittest.TestCase):
    def assert_finds(self, path, text, words):
        found = messages(path, text)
        self.assertEqual(len(found), 1, found)
        self.assertIn(words, found[0])

    def test_lines_are_counted_in_characters(self):
        self.assertEqual(messages("worker/a.cc", "// " + "…" * 97), [])
        self.assert_finds("worker/a.cc", "// " + "a" * 98, "101 columns")
        self.assertEqual(messages("README.md", "a" * 200), [])

    def test_exceptions_and_unchecked_values_are_found_in_code_only(self):
        self.assert_finds("worker/a.cc", "void F() { throw 1; }", "throw")
        self.assert_finds("worker/a.cc", "int x = F().value();", ".value()")
        self.assertEqual(messages("tests/worker/a.cc", "int x = F().value();"), [])
        self.assertEqual(messages("worker/a.cc", '// throw\nchar c[] = "throw .value()";'), [])

    def test_unfinished_work_is_found_everywhere(self):
        self.assert_finds("README.md", "TO" "DO: write", "unfinished")
        self.assert_finds("worker/a.py", "# FIX" "ME", "unfinished")

    def test_paths_of_one_machine_are_found(self):
        self.assert_finds("deploy/a.sh", "cd /ho" "me/me/src", "a path of one machine")
        self.assertEqual(messages("deploy/a.sh", "ls https://host/a ../work/x $HOME/x"), [])

    def test_header_guards_follow_the_path(self):
        guard = "CLUSTERKV_WORKER_A_B_H_"
        good = f"// What it is.\n#ifndef {guard}\n#define {guard}\n\n#endif  // {guard}\n"
        self.assertEqual(messages("worker/a_b.h", good), [])
        self.assert_finds("worker/a_c.h", good, "expected CLUSTERKV_WORKER_A_C_H_")
        self.assert_finds("worker/a_b.h", good.replace("#endif  // ", "#endif // "), "end with")
        self.assert_finds("worker/a_b.h", "#pragma once\n", "header guard")

    def test_long_functions_are_found_and_kernels_may_be_longer(self):
        for suffix, limit in ((".cc", 70), (".cu", 120)):
            fits = "int F(int a) {\n" + "  ++a;\n" * (limit - 2) + "}\n"
            self.assertEqual(messages("kernels/a" + suffix, fits), [])
            long = "int F(int a) {\n" + "  ++a;\n" * (limit - 1) + "}\n"
            self.assert_finds("kernels/a" + suffix, long, f"F has {limit + 1} lines")
        self.assert_finds("worker/a.py", "def f():\n" + "    pass\n" * 70, "f has 71 lines")

    def test_functions_are_found_in_classes_and_namespaces(self):
        code = """
namespace a::b {
namespace {
enum class E { kA, kB };
struct S final : public T {
  int F() const override { return x_; }
  int x_ = {3};
};
template <typename T>
class C {
 public:
  C() : a_(1), b_{2} {
    if (a_) { G(); }
  }
};
constexpr int kTable[] = {1, 2, 3};
}  // namespace
auto H(int a) -> int {
  auto f = [&](int b) { return b; };
  while (a) { f(a--); }
  return 0;
}
TEST(Suite, Behaviour) {
  EXPECT_TRUE(true);
}
}  // namespace a::b
"""
        self.assertEqual(function_lengths(code),
                         [("F", 1), ("C", 3), ("H", 5), ("TEST", 3)])

    def test_macros_and_raw_strings_do_not_unbalance_the_braces(self):
        code = '#define OPEN {  \\\n  {\nint F() {\n  return 1\'000\'000 + sizeof(R"x({{")x");\n}\n'
        self.assertEqual(function_lengths(code), [("F", 3)])


if __name__ == "__main__":
    unittest.main()
