// ckv top: a server, live. Off a terminal it shows one second of it and ends.
#include <poll.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>

#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "worker/ckv/command.h"
#include "worker/ckv/connection.h"
#include "worker/ckv/terminal.h"

namespace clusterkv::worker::ckv {
namespace {

volatile std::sig_atomic_t g_ended = 0;

// The alternate screen with keys as they come; the terminal is as before when this goes out of
// scope.
class FullScreen {
 public:
  FullScreen() {
    tcgetattr(0, &before_);
    termios raw = before_;
    // Ctrl-C comes as a key, so that the terminal is put back whatever ends the program.
    raw.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO | ISIG);
    tcsetattr(0, TCSANOW, &raw);
    std::signal(SIGTERM, [](int) { g_ended = 1; });
    std::printf("\x1b[?1049h\x1b[?25l");
  }
  ~FullScreen() {
    std::printf("\x1b[?25h\x1b[?1049l");
    std::fflush(stdout);
    tcsetattr(0, TCSANOW, &before_);
  }
  FullScreen(const FullScreen&) = delete;
  FullScreen& operator=(const FullScreen&) = delete;

  // Waits for a key or the interval. True: the person wants to leave.
  bool WaitForQuit(absl::Duration interval) const {
    const absl::Time end = absl::Now() + interval;
    while (g_ended == 0 && absl::Now() < end) {
      pollfd keys{0, POLLIN, 0};
      const int64_t left = absl::ToInt64Milliseconds(end - absl::Now());
      if (poll(&keys, 1, static_cast<int>(std::clamp<int64_t>(left, 0, 200))) <= 0) continue;
      char key = 0;
      if (read(0, &key, 1) <= 0 || key == 'q' || key == 'Q' || key == 3 || key == 4) return true;
    }
    return g_ended != 0;
  }

 private:
  termios before_{};
};

struct Sample {
  v1::Stats stats;
  std::vector<v1::Sequence> sequences;
  absl::Time taken;
};

std::string Rate(uint64_t before, uint64_t now, double seconds) {
  return Significant(static_cast<double>(now - std::min(before, now)) / seconds, 3);
}

std::string ByteRate(uint64_t before, uint64_t now, double seconds) {
  return HumanBytes(static_cast<double>(now - std::min(before, now)) / seconds) + "/s";
}

// What changed between two samples, and what is there now.
std::string Screen(const std::string& title, const Sample& before, const Sample& now, size_t rows) {
  const v1::Stats& a = before.stats;
  const v1::Stats& b = now.stats;
  const double seconds = std::max(1e-3, absl::ToDoubleSeconds(now.taken - before.taken));
  const double page = static_cast<double>(b.page_bytes());
  const v1::Ledger& pages = b.pages();
  const double used =
      pages.total() == 0 ? 0 : 1 - static_cast<double>(pages.free()) / pages.total();
  const uint64_t hits = b.hits() - std::min(a.hits(), b.hits());
  const uint64_t misses = b.misses() - std::min(a.misses(), b.misses());
  const Color color = used > 0.95 ? Color::kRed : used > 0.8 ? Color::kYellow : Color::kGreen;
  std::string text = Colored(title, Color::kBold) + "  up " +
                     HumanDuration(absl::Milliseconds(b.uptime_ms())) +
                     (b.draining() ? "  " + Colored("draining", Color::kYellow) : "") + "\n\n";
  text += "arena      " + Colored(Bar(used, 40), color) + "  " +
          HumanBytes((pages.total() - pages.free()) * page) + " of " +
          HumanBytes(pages.total() * page) + "\n";
  text += "selects    " + Rate(a.selects(), b.selects(), seconds) + "/s   p50 " +
          HumanDuration(absl::Microseconds(b.select_p50_us())) + "   p99 " +
          HumanDuration(absl::Microseconds(b.select_p99_us())) + "   queued " +
          std::to_string(b.queued_selects()) + "\n";
  text += "hit rate   " +
          (hits + misses == 0 ? "–" : Significant(100.0 * hits / (hits + misses), 3) + " %") +
          "   records " + ByteRate(a.recalled_bytes(), b.recalled_bytes(), seconds) + "   states " +
          ByteRate(a.state_bytes(), b.state_bytes(), seconds) + "\n";
  text += "received   " + ByteRate(a.ingested_bytes(), b.ingested_bytes(), seconds) +
          "   builds queued " + std::to_string(b.queued_builds()) + "   evictions " +
          std::to_string(b.evictions()) + "\n";
  text += "in use by  " + std::to_string(b.sequences()) + " sequences, " +
          std::to_string(b.attachments()) + " attachments, " + std::to_string(b.sessions()) +
          " sessions; resident " + HumanBytes(static_cast<double>(b.resident_bytes())) + "\n\n";
  std::vector<v1::Sequence> sequences = now.sequences;
  std::sort(sequences.begin(), sequences.end(),
            [](const v1::Sequence& x, const v1::Sequence& y) { return x.bytes() > y.bytes(); });
  Table table({"sequence", "state", "tokens", "size", "attached"}, 2);
  for (size_t i = 0; i < sequences.size() && i < rows; ++i) {
    table.AddRow({sequences[i].handle().name(), StateName(sequences[i].state()),
                  HumanCount(sequences[i].tokens()),
                  HumanBytes(static_cast<double>(sequences[i].bytes())),
                  std::to_string(sequences[i].attachments())});
  }
  if (!sequences.empty()) text += table.Text();
  if (sequences.size() > rows) {
    text += "… and " + std::to_string(sequences.size() - rows) + " smaller ones\n";
  }
  return text;
}

class TopCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    server_.Register(flags);
    admin_.Register(flags, /*required=*/true, &server_);
    flags.Duration("interval", &interval_, "between two looks");
  }

  absl::Status Run() override {
    admin_.connect_timeout = server_.connect_timeout;
    CKV_ASSIGN_OR_RETURN(client_, ConnectClient(server_, /*session=*/false));
    CKV_ASSIGN_OR_RETURN(admin_client_, AdminClient::Connect(admin_));
    CKV_ASSIGN_OR_RETURN(Sample before, Take());
    if (!IsTerminal(0) || !IsTerminal(1)) {
      absl::SleepFor(interval_);
      CKV_ASSIGN_OR_RETURN(const Sample now, Take());
      std::printf("%s", Screen(server_.server, before, now, 20).c_str());
      return absl::OkStatus();
    }
    FullScreen screen;
    Sample now = before;
    while (true) {
      std::string text = Screen(server_.server, before, now, 20);
      for (size_t at = 0; (at = text.find('\n', at)) != text.npos; at += 4) {
        text.insert(at, "\x1b[K");  // what an earlier, longer line left
      }
      std::printf("\x1b[H%s\n%s\x1b[K\x1b[J", text.c_str(),
                  Colored("q quits", Color::kDim).c_str());
      std::fflush(stdout);
      if (screen.WaitForQuit(interval_)) return absl::OkStatus();
      before = now;
      CKV_ASSIGN_OR_RETURN(now, Take());
    }
  }

 private:
  absl::StatusOr<Sample> Take() {
    Sample sample;
    CKV_ASSIGN_OR_RETURN(sample.stats, admin_client_->GetStats());
    CKV_ASSIGN_OR_RETURN(sample.sequences, client_->ListSequences(""));
    sample.taken = absl::Now();
    return sample;
  }

  ServerFlags server_;
  AdminFlags admin_;
  absl::Duration interval_ = absl::Seconds(1);
  std::unique_ptr<Client> client_;
  std::unique_ptr<AdminClient> admin_client_;
};

}  // namespace

std::unique_ptr<Command> MakeTopCommand() { return std::make_unique<TopCommand>(); }

}  // namespace clusterkv::worker::ckv
