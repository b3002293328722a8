// The program clusterkv-server: its flags, what it prints, how it ends.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <fstream>
#include <thread>

#include "absl/time/clock.h"
#include "tests/conformance/service_harness.h"

namespace clusterkv::cache_service::testing {
namespace {

using ::testing::HasSubstr;

class Program {
 public:
  // open_files: both limits of the process; 0: as they are.
  explicit Program(std::vector<std::string> arguments, rlim_t open_files = 0) {
    arguments.insert(arguments.begin(), CLUSTERKV_SERVER);
    int out[2], err[2];
    EXPECT_EQ(pipe2(out, O_CLOEXEC), 0);
    EXPECT_EQ(pipe2(err, O_CLOEXEC), 0);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(out[1], STDOUT_FILENO);
      dup2(err[1], STDERR_FILENO);
      const rlimit limit = {open_files, open_files};
      if (open_files > 0) setrlimit(RLIMIT_NOFILE, &limit);
      execv(argv[0], argv.data());
      _exit(127);
    }
    close(out[1]);
    close(err[1]);
    out_ = out[0];
    err_ = err[0];
  }
  ~Program() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    close(out_);
    close(err_);
  }

  // "listening on A, admin on B".
  void AwaitServing() {
    std::string line;
    for (char c = 0; read(out_, &c, 1) == 1 && c != '\n';) line.push_back(c);
    const size_t comma = line.find(", admin on ");
    ASSERT_NE(comma, std::string::npos) << line;
    address_ = line.substr(13, comma - 13);
    admin_ = line.substr(comma + 11);
  }
  const std::string& address() const { return address_; }
  void Signal(int signal) { kill(pid_, signal); }
  int AwaitExit() {
    int status = 0;
    waitpid(std::exchange(pid_, 0), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  std::string Output() { return ReadAll(out_); }
  std::string Errors() { return ReadAll(err_); }
  std::unique_ptr<v1::CacheService::Stub> Stub() {
    return v1::CacheService::NewStub(
        grpc::CreateChannel(address_, grpc::InsecureChannelCredentials()));
  }

 private:
  static std::string ReadAll(int fd) {
    std::string text;
    char buffer[4096];
    for (ssize_t got; (got = read(fd, buffer, sizeof(buffer))) > 0;) {
      text.append(buffer, static_cast<size_t>(got));
    }
    return text;
  }

  pid_t pid_ = 0;
  int out_ = -1, err_ = -1;
  std::string address_, admin_;
};

std::vector<std::string> Flags(std::vector<std::string> more = {}) {
  more.insert(more.end(), {"--listen=127.0.0.1:0", "--admin_listen=127.0.0.1:0",
                           "--arena_bytes=16MiB", "--device=cpu"});
  return more;
}

bool Answers(v1::CacheService::Stub& stub) {
  v1::ServerInfo info;
  const auto context = MakeContext();
  context->set_wait_for_ready(true);
  return stub.GetServerInfo(context.get(), {}, &info).ok();
}

TEST(ServerProgramTest, ServesUntilASignalAndEndsWithZero) {
  for (const int signal : {SIGTERM, SIGINT}) {
    Program program(Flags());
    program.AwaitServing();
    EXPECT_TRUE(Answers(*program.Stub()));
    program.Signal(signal);
    EXPECT_EQ(program.AwaitExit(), 0);
    EXPECT_THAT(program.Errors(), HasSubstr("\"message\":\"stopped\",\"drained\":true"));
  }
}

TEST(ServerProgramTest, AWrongConfigurationEndsWithTwo) {
  Program flag(Flags({"--arena_size=1"}));
  EXPECT_EQ(flag.AwaitExit(), 2);
  EXPECT_THAT(flag.Errors(), HasSubstr("unknown flag --arena_size; did you mean --arena_bytes?"));

  const std::string file = ::testing::TempDir() + "server_program_test.txtpb";
  std::ofstream(file) << "listen: \"127.0.0.1:0\"\nbuild_threads: 5000\n";
  Program value({"--config=" + file, "--check_config"});
  EXPECT_EQ(value.AwaitExit(), 2);
  EXPECT_THAT(value.Errors(),
              HasSubstr(file + ":2:1: build_threads: expected 1 to 1024, got 5000"));

  std::ofstream(file) << "listen: \"127.0.0.1:0\"\nbuild_threads: 5\n";
  Program good({"--config=" + file, "--check_config"});
  EXPECT_EQ(good.AwaitExit(), 0);
}

TEST(ServerProgramTest, ATakenPortEndsWithOne) {
  Program first(Flags());
  first.AwaitServing();
  Program second({"--listen=" + first.address(), "--admin_listen=127.0.0.1:0",
                  "--arena_bytes=16MiB", "--log_format=text"});
  EXPECT_EQ(second.AwaitExit(), 1);
  EXPECT_THAT(second.Errors(), HasSubstr("cannot listen on " + first.address()));
}

TEST(ServerProgramTest, HelpAndVersionArePrinted) {
  Program help({"--help"});
  EXPECT_EQ(help.AwaitExit(), 0);
  EXPECT_THAT(help.Output(), HasSubstr("--drain_timeout_ms"));
  Program version({"--version"});
  EXPECT_EQ(version.AwaitExit(), 0);
  EXPECT_THAT(version.Output(), HasSubstr("gRPC 1."));
}

TEST(ServerProgramTest, DrainingLetsCallsInFlightEnd) {
  Program program(Flags({"--drain_delay_ms=3000"}));
  program.AwaitServing();
  const auto stub = program.Stub();
  ASSERT_TRUE(Answers(*stub));
  std::atomic<bool> stop = false;
  std::atomic<int> answered = 0;
  std::thread caller([&] {
    while (!stop) {
      ASSERT_TRUE(Answers(*stub)) << "calls of the delay are answered";
      ++answered;
    }
  });
  while (answered < 10) absl::SleepFor(absl::Milliseconds(1));
  program.Signal(SIGTERM);
  absl::SleepFor(absl::Milliseconds(100));
  const int before = answered;
  while (answered < before + 10) absl::SleepFor(absl::Milliseconds(1));
  stop = true;
  caller.join();
  EXPECT_EQ(program.AwaitExit(), 0);
}

TEST(ServerProgramTest, ServesAgainAfterItRanOutOfDescriptors) {
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
  GTEST_SKIP()
      << "the undefined-behaviour sanitizer needs descriptors of its own (a pipe per check of a "
         "virtual table) and takes their want for an error; other presets run this";
#endif
#endif
  Program program(Flags(), 64);
  program.AwaitServing();
  const int port = std::atoi(program.address().substr(program.address().rfind(':') + 1).c_str());
  sockaddr_in name = {};
  name.sin_family = AF_INET;
  name.sin_port = htons(static_cast<uint16_t>(port));
  name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::vector<int> flood;
  for (int i = 0; i < 300; ++i) {
    flood.push_back(socket(AF_INET, SOCK_STREAM, 0));
    EXPECT_EQ(connect(flood.back(), reinterpret_cast<sockaddr*>(&name), sizeof(name)), 0);
  }
  absl::SleepFor(absl::Milliseconds(200));
  for (const int fd : flood) close(fd);
  EXPECT_TRUE(Answers(*program.Stub()));
  program.Signal(SIGTERM);
  EXPECT_EQ(program.AwaitExit(), 0);
}

}  // namespace
}  // namespace clusterkv::cache_service::testing
