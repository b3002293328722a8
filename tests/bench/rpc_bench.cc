// The wire's cost: a unary select against a raw socket echo of the same bytes, StreamSelect against
// unary, ingest against memcpy and against a plain gRPC upload of the same bytes.
//
// Servers are processes of their own: clusterkv-server from this program's folder, once sleeping
// and once spinning, and this program again for the peers.
#include <grpcpp/grpcpp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "clusterkv/v1/cache_service.grpc.pb.h"
#include "kernels/base/check.h"
#include "kernels/base/element_type.h"
#include "tests/bench/bench.h"

namespace clusterkv::bench {
namespace {

// Of the sequence that is selected from: small, so that the wire shows.
constexpr uint32_t kKvHeads = 2, kQueryHeads = 4, kHeadDim = 64, kTokens = 1024;
constexpr int kChunkBytes = 1 << 20;  // of one upload's message, keys and values together
constexpr int kUploadChunks = 64;

// A program of this folder that says "… on HOST:PORT" when it serves; killed when this object dies.
class Process {
 public:
  explicit Process(std::vector<std::string> arguments) {
    int out[2];
    CKV_CHECK(pipe(out) == 0);
    pid_ = fork();
    CKV_CHECK(pid_ >= 0);
    if (pid_ == 0) {
      dup2(out[1], STDOUT_FILENO);
      close(out[0]);
      std::vector<char*> argv;
      for (std::string& argument : arguments) argv.push_back(argument.data());
      argv.push_back(nullptr);
      execv(argv[0], argv.data());
      _exit(127);
    }
    close(out[1]);
    std::string line;
    for (char c = 0; read(out[0], &c, 1) == 1 && c != '\n';) line.push_back(c);
    close(out[0]);
    const size_t begin = line.find(" on ");
    CKV_CHECK(begin != std::string::npos) << "cannot start " << arguments[0] << ": " << line;
    const size_t end = line.find(',', begin);
    address_ = line.substr(begin + 4, end == std::string::npos ? end : end - begin - 4);
  }
  ~Process() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  const std::string& address() const { return address_; }
  int port() const { return std::atoi(address_.substr(address_.rfind(':') + 1).c_str()); }

 private:
  pid_t pid_ = 0;
  std::string address_;
};

// Keeps the calling thread on one processor while this object lives.
class OnProcessor {
 public:
  explicit OnProcessor(int processor) {
    CKV_CHECK(sched_getaffinity(0, sizeof(before_), &before_) == 0);
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(processor, &only);
    sched_setaffinity(0, sizeof(only), &only);  // where it may not be there, it stays free
  }
  ~OnProcessor() { sched_setaffinity(0, sizeof(before_), &before_); }

 private:
  cpu_set_t before_;
};

// --- peers

void ReadFull(int fd, char* to, size_t size) {
  while (size > 0) {
    const ssize_t got = read(fd, to, size);
    if (got <= 0) _exit(0);
    to += got;
    size -= static_cast<size_t>(got);
  }
}

void WriteFull(int fd, const char* from, size_t size) {
  while (size > 0) {
    const ssize_t put = write(fd, from, size);
    if (put <= 0) _exit(0);
    from += put;
    size -= static_cast<size_t>(put);
  }
}

// Reads `request` bytes, answers `response` bytes, for ever. A blocking thread: the leanest server
// there is that sleeps between requests.
[[noreturn]] void ServeEcho(size_t request, size_t response) {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in name = {};
  name.sin_family = AF_INET;
  name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(name);
  CKV_CHECK(bind(listener, reinterpret_cast<sockaddr*>(&name), size) == 0);
  CKV_CHECK(listen(listener, 1) == 0);
  getsockname(listener, reinterpret_cast<sockaddr*>(&name), &size);
  std::printf("listening on 127.0.0.1:%d\n", ntohs(name.sin_port));
  std::fflush(stdout);
  const int fd = accept(listener, nullptr, nullptr);
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  std::string bytes(std::max(request, response), 'x');
  // Its ends stay on two processors, as on two hosts: on one, which the kernel chooses in some runs
  // and not in others, nobody has to be woken.
  const OnProcessor last(static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)) - 1);
  while (true) {
    ReadFull(fd, bytes.data(), request);
    WriteFull(fd, bytes.data(), response);
  }
}

// PutKv that parses its messages, as gRPC does for everybody, and drops them.
class DroppingService final : public v1::CacheService::CallbackService {
  class Reactor final : public grpc::ServerReadReactor<v1::PutKvRequest> {
   public:
    Reactor() { StartRead(&request_); }
    void OnReadDone(bool ok) override {
      if (ok) {
        StartRead(&request_);
      } else {
        Finish(grpc::Status::OK);
      }
    }
    void OnDone() override { delete this; }

   private:
    v1::PutKvRequest request_;
  };
  grpc::ServerReadReactor<v1::PutKvRequest>* PutKv(grpc::CallbackServerContext*,
                                                   v1::PutKvResponse*) override {
    return new Reactor;
  }
};

[[noreturn]] void ServeUpload() {
  DroppingService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  builder.SetMaxReceiveMessageSize(8 << 20);
  const auto server = builder.BuildAndStart();
  std::printf("listening on 127.0.0.1:%d\n", port);
  std::fflush(stdout);
  server->Wait();
  std::exit(0);
}

class EchoClient {
 public:
  EchoClient(int port, size_t request, size_t response)
      : request_(request), bytes_(std::max(request, response), 'x'), response_(response) {
    fd_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in name = {};
    name.sin_family = AF_INET;
    name.sin_port = htons(static_cast<uint16_t>(port));
    name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CKV_CHECK(connect(fd_, reinterpret_cast<sockaddr*>(&name), sizeof(name)) == 0);
    const int on = 1;
    setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  }
  ~EchoClient() { close(fd_); }
  void Call() {
    WriteFull(fd_, bytes_.data(), request_);
    ReadFull(fd_, bytes_.data(), response_);
  }

 private:
  int fd_ = -1;
  const size_t request_;
  std::string bytes_;
  const size_t response_;
};

// --- our server's clients

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

std::string Numbers(size_t count, uint32_t seed) {
  std::vector<float> numbers(count);
  for (float& number : numbers) {
    seed = seed * 1664525 + 1013904223;
    number = static_cast<float>(seed >> 8) / (1 << 24) - 0.5f;
  }
  std::string bytes(count * 2, '\0');
  kernels::FromFloat(numbers.data(), kernels::ElementType::kBFloat16, static_cast<int64_t>(count),
                     reinterpret_cast<std::byte*>(bytes.data()));
  return bytes;
}

void MakeReady(v1::CacheService::Stub& stub, const std::string& name) {
  v1::OpenSequenceRequest open;
  open.set_name(name);
  open.mutable_shape()->set_layers(1);
  open.mutable_shape()->set_kv_heads(kKvHeads);
  open.mutable_shape()->set_query_heads(kQueryHeads);
  open.mutable_shape()->set_head_dim(kHeadDim);
  open.set_prompt_tokens(kTokens);
  open.mutable_select()->set_budget_tokens(32);
  open.mutable_select()->set_coded_tokens(128);
  v1::Sequence sequence;
  grpc::ClientContext open_context, put_context, seal_context;
  grpc::Status status = stub.OpenSequence(&open_context, open, &sequence);
  CKV_CHECK(status.ok()) << status.error_message();
  v1::PutKvResponse put;
  const auto writer = stub.PutKv(&put_context, &put);
  v1::PutKvRequest request;
  *request.mutable_sequence() = sequence.handle();
  request.mutable_chunk()->set_tokens(kTokens);
  request.mutable_chunk()->set_keys(Numbers(kTokens * kKvHeads * kHeadDim, 1));
  request.mutable_chunk()->set_values(Numbers(kTokens * kKvHeads * kHeadDim, 2));
  writer->Write(request);
  writer->WritesDone();
  status = writer->Finish();
  CKV_CHECK(status.ok()) << status.error_message();
  v1::SealSequenceRequest seal;
  *seal.mutable_sequence() = sequence.handle();
  status = stub.SealSequence(&seal_context, seal, &sequence);
  CKV_CHECK(status.ok()) << status.error_message();
}

v1::SelectClustersRequest SelectRequest(const std::string& name) {
  v1::SelectClustersRequest request;
  v1::SelectItem* item = request.add_items();
  item->mutable_sequence()->set_name(name);
  item->mutable_queries()->set_type(v1::ELEMENT_TYPE_BFLOAT16);
  item->mutable_queries()->set_data(Numbers(kQueryHeads * kHeadDim, 3));
  request.set_want_state(true);
  return request;
}

class UnaryClient {
 public:
  UnaryClient(const std::string& address, const std::string& name)
      : stub_(v1::CacheService::NewStub(Connect(address))), request_(SelectRequest(name)) {
    MakeReady(*stub_, name);
  }
  void Call() {
    grpc::ClientContext context;
    const grpc::Status status = stub_->SelectClusters(&context, request_, &response_);
    CKV_CHECK(status.ok()) << status.error_message();
    CKV_CHECK(!response_.results(0).has_error()) << response_.results(0).error().message();
  }
  size_t request_bytes() const { return request_.ByteSizeLong(); }
  size_t response_bytes() const { return response_.ByteSizeLong(); }
  uint32_t select_us() const { return response_.select_us(); }

 private:
  std::unique_ptr<v1::CacheService::Stub> stub_;
  const v1::SelectClustersRequest request_;
  v1::SelectClustersResponse response_;
};

// One request after the other on one stream. With `spin` it polls its completion queue, as a decode
// session does, instead of sleeping.
class StreamClient {
 public:
  StreamClient(const std::string& address, const std::string& name, bool spin)
      : spin_(spin),
        stub_(v1::CacheService::NewStub(Connect(address))),
        request_(SelectRequest(name)) {
    MakeReady(*stub_, name);
    stream_ = stub_->AsyncStreamSelect(&context_, &queue_, this);
    CKV_CHECK(Await());
  }
  ~StreamClient() {
    context_.TryCancel();
    grpc::Status status;
    stream_->Finish(&status, this);
    Await();
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
  }
  void Call() {
    stream_->Write(request_, this);
    stream_->Read(&response_, this);
    CKV_CHECK(Await() && Await());
    CKV_CHECK(!response_.results(0).has_error()) << response_.results(0).error().message();
  }

 private:
  bool Await() {
    void* tag = nullptr;
    bool ok = false;
    if (!spin_) return queue_.Next(&tag, &ok) && ok;
    while (queue_.AsyncNext(&tag, &ok, gpr_inf_past(GPR_CLOCK_MONOTONIC)) ==
           grpc::CompletionQueue::TIMEOUT) {
    }
    return ok;
  }

  const bool spin_;
  std::unique_ptr<v1::CacheService::Stub> stub_;
  const v1::SelectClustersRequest request_;
  v1::SelectClustersResponse response_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<
      grpc::ClientAsyncReaderWriter<v1::SelectClustersRequest, v1::SelectClustersResponse>>
      stream_;
};

// --- latency

struct Latency {
  double p50 = 0, p99 = 0;
};

Latency Measure(double seconds, const std::function<void()>& call) {
  std::vector<double> samples;
  const double end = Now() + seconds;
  do {
    const double start = Now();
    call();
    samples.push_back(Now() - start);
  } while (samples.back() < 0 || Now() < end);
  return {Quantile(samples, 0.5), Quantile(samples, 0.99)};
}

// p50 and p99 of both sides in alternating rounds, as two rows. The target is the median's.
void CompareLatency(Report& report, const std::string& name, const std::function<void()>& ours,
                    const std::string& peer_name, const std::function<void()>& peer,
                    const std::string& target) {
  Measure(report.seconds() / 2, ours);
  Measure(report.seconds() / 2, peer);
  std::vector<double> our_p50, our_p99, peer_p50, peer_p99, ratio50, ratio99;
  for (int round = 0; round < report.rounds(); ++round) {
    Latency a, b;
    if (round % 2 == 0) a = Measure(report.seconds(), ours);
    b = Measure(report.seconds(), peer);
    if (round % 2 != 0) a = Measure(report.seconds(), ours);
    our_p50.push_back(a.p50 * 1e6);
    our_p99.push_back(a.p99 * 1e6);
    peer_p50.push_back(b.p50 * 1e6);
    peer_p99.push_back(b.p99 * 1e6);
    ratio50.push_back(a.p50 / b.p50);
    ratio99.push_back(a.p99 / b.p99);
  }
  report.Add({name + " p50", Quantile(our_p50, 0.5), "us", peer_name, Quantile(peer_p50, 0.5),
              Quantile(ratio50, 0.5), Quantile(ratio50, 0), Quantile(ratio50, 1), target});
  report.Add({name + " p99", Quantile(our_p99, 0.5), "us", peer_name, Quantile(peer_p99, 0.5),
              Quantile(ratio99, 0.5), Quantile(ratio99, 0), Quantile(ratio99, 1), ""});
}

// --- ingest

// kUploadChunks of kChunkBytes on one PutKv stream. With a sequence: opened before and released
// after, outside of what is timed.
class UploadClient {
 public:
  UploadClient(const std::string& address, bool real)
      : real_(real), stub_(v1::CacheService::NewStub(Connect(address))) {
    constexpr int kTokenBytes = 2 * 8 * 128 * 2;  // K and V, 8 KV heads of 128, bf16
    tokens_ = kChunkBytes / kTokenBytes;
    const size_t numbers = size_t{kChunkBytes} / 4;
    for (int i = 0; i < kUploadChunks; ++i) {
      v1::PutKvRequest& request = requests_.emplace_back();
      request.mutable_sequence()->set_name("upload");
      request.mutable_chunk()->set_first_token(static_cast<uint32_t>(i * tokens_));
      request.mutable_chunk()->set_tokens(static_cast<uint32_t>(tokens_));
      request.mutable_chunk()->set_keys(Numbers(numbers, static_cast<uint32_t>(2 * i)));
      request.mutable_chunk()->set_values(Numbers(numbers, static_cast<uint32_t>(2 * i + 1)));
    }
  }

  // Seconds from the first write to the server's answer.
  double Upload() {
    if (real_) Open();
    grpc::ClientContext context;
    v1::PutKvResponse response;
    const double start = Now();
    const auto writer = stub_->PutKv(&context, &response);
    for (const v1::PutKvRequest& request : requests_) CKV_CHECK(writer->Write(request));
    writer->WritesDone();
    const grpc::Status status = writer->Finish();
    const double seconds = Now() - start;
    CKV_CHECK(status.ok()) << status.error_message();
    if (real_) Release();
    return seconds;
  }

  const std::vector<v1::PutKvRequest>& requests() const { return requests_; }

 private:
  void Open() {
    v1::OpenSequenceRequest open;
    open.set_name("upload");
    open.mutable_shape()->set_layers(1);
    open.mutable_shape()->set_kv_heads(8);
    open.mutable_shape()->set_query_heads(32);
    open.mutable_shape()->set_head_dim(128);
    // One token more than is put: ingest alone is timed, not the clustering that a whole layer
    // starts.
    open.set_prompt_tokens(static_cast<uint32_t>(tokens_ * kUploadChunks + 1));
    v1::Sequence sequence;
    grpc::ClientContext context;
    const grpc::Status status = stub_->OpenSequence(&context, open, &sequence);
    CKV_CHECK(status.ok()) << status.error_message();
  }
  void Release() {
    v1::ReleaseSequenceRequest release;
    release.mutable_sequence()->set_name("upload");
    v1::ReleaseSequenceResponse response;
    grpc::ClientContext context;
    CKV_CHECK(stub_->ReleaseSequence(&context, release, &response).ok());
  }

  const bool real_;
  int tokens_ = 0;
  std::unique_ptr<v1::CacheService::Stub> stub_;
  std::vector<v1::PutKvRequest> requests_;
};

double MemcpySeconds(const UploadClient& client, std::string* to) {
  const double start = Now();
  size_t at = 0;
  for (const v1::PutKvRequest& request : client.requests()) {
    for (const std::string* bytes : {&request.chunk().keys(), &request.chunk().values()}) {
      std::memcpy(to->data() + at, bytes->data(), bytes->size());
      at += bytes->size();
    }
  }
  return Now() - start;
}

void CompareIngest(Report& report, UploadClient& ours, UploadClient& plain) {
  const double gigabytes = static_cast<double>(kChunkBytes) * kUploadChunks * 1e-9;
  std::string memory(size_t{kChunkBytes} * kUploadChunks, 'x');
  ours.Upload();
  plain.Upload();
  std::vector<double> our_rate, plain_rate, memcpy_rate, to_plain, to_memcpy;
  for (int round = 0; round < 2 * report.rounds(); ++round) {
    double a = 0, b = 0;
    if (round % 2 == 0) a = ours.Upload();
    b = plain.Upload();
    if (round % 2 != 0) a = ours.Upload();
    const double c = MemcpySeconds(ours, &memory);
    our_rate.push_back(gigabytes / a);
    plain_rate.push_back(gigabytes / b);
    memcpy_rate.push_back(gigabytes / c);
    to_plain.push_back(b / a);
    to_memcpy.push_back(c / a);
  }
  const auto row = [&](const char* peer, const std::vector<double>& rate,
                       const std::vector<double>& ratio, const char* target) {
    report.Add({"ingest, 1 MiB chunks", Quantile(our_rate, 0.5), "GB/s", peer, Quantile(rate, 0.5),
                Quantile(ratio, 0.5), Quantile(ratio, 0), Quantile(ratio, 1), target});
  };
  row("plain gRPC upload", plain_rate, to_plain, ">= 0.8");
  row("memcpy", memcpy_rate, to_memcpy, "");
}

// Unary and streamed selects on two of our servers, one of which spins.
void CompareSelects(Report& report, const std::string& self, const std::string& sleeping,
                    const std::string& spinning) {
  UnaryClient unary(sleeping, "unary");
  std::vector<double> work_us;
  for (int i = 0; i < 500; ++i) {
    unary.Call();
    work_us.push_back(unary.select_us());
  }
  Process echo({self, "--serve_echo", std::to_string(unary.request_bytes()),
                std::to_string(unary.response_bytes())});
  EchoClient raw(echo.port(), unary.request_bytes(), unary.response_bytes());
  std::printf("select: %zu bytes to, %zu from; its work takes %.0f us\n", unary.request_bytes(),
              unary.response_bytes(), Quantile(work_us, 0.5));

  {
    const OnProcessor first(0);  // for both; the echo's other end is on the last
    CompareLatency(
        report, "SelectClusters", [&] { unary.Call(); }, "raw TCP echo", [&] { raw.Call(); },
        "<= 3");
  }
  {
    StreamClient stream(spinning, "spinning", true);
    CompareLatency(
        report, "StreamSelect, both spin", [&] { stream.Call(); }, "SelectClusters",
        [&] { unary.Call(); }, "<= 0.5");
  }
  {
    StreamClient stream(sleeping, "client_spins", true);
    CompareLatency(
        report, "StreamSelect, client spins", [&] { stream.Call(); }, "SelectClusters",
        [&] { unary.Call(); }, "");
  }
  {
    StreamClient stream(sleeping, "sleeping", false);
    CompareLatency(
        report, "StreamSelect, both sleep", [&] { stream.Call(); }, "SelectClusters",
        [&] { unary.Call(); }, "");
  }
}

int Main(int argc, char** argv) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe");
  if (argc == 4 && std::string(argv[1]) == "--serve_echo") {
    ServeEcho(std::strtoul(argv[2], nullptr, 10), std::strtoul(argv[3], nullptr, 10));
  }
  if (argc == 2 && std::string(argv[1]) == "--serve_upload") ServeUpload();
  // --only=select or --only=ingest, before the flags of every benchmark.
  const std::string only = argc > 1 && std::strncmp(argv[1], "--only=", 7) == 0 ? argv[1] + 7 : "";
  if (!only.empty()) {
    argv[1] = argv[0];
    ++argv;
    --argc;
  }

  Report report("rpc", argc, argv);
  const std::string program = std::filesystem::path(self).parent_path() / "clusterkv-server";
  const auto server = [&](const char* spin) {
    return std::vector<std::string>{program,
                                    "--listen=127.0.0.1:0",
                                    "--admin_listen=127.0.0.1:0",
                                    "--arena_bytes=512MiB",
                                    "--log_level=error",
                                    std::string("--spin_us=") + spin};
  };
  // Forked before this process has threads.
  Process sleeping(server("0")), spinning(server("200")), upload({self, "--serve_upload"});
  if (only != "ingest") CompareSelects(report, self, sleeping.address(), spinning.address());
  if (only != "select") {
    UploadClient ours(sleeping.address(), true), plain(upload.address(), false);
    CompareIngest(report, ours, plain);
  }
  return report.Finish();
}

}  // namespace
}  // namespace clusterkv::bench

int main(int argc, char** argv) { return clusterkv::bench::Main(argc, argv); }
