#include "cache_service/rpc/reflection_rpc.h"

#include <set>
#include <utility>

#include "google/protobuf/descriptor.h"
#include "google/protobuf/descriptor.pb.h"
#include "grpc/reflection/v1/reflection.grpc.pb.h"
#include "grpc/reflection/v1alpha/reflection.grpc.pb.h"

namespace clusterkv::cache_service {
namespace {

using google::protobuf::DescriptorPool;
using google::protobuf::FileDescriptor;

// One stream of questions about descriptors. The messages of v1 and v1alpha differ in their package
// only.
template <typename Request, typename Response>
class ReflectionStream final : public grpc::ServerBidiReactor<Request, Response> {
 public:
  explicit ReflectionStream(const std::vector<std::string>& services) : services_(services) {
    this->StartRead(&request_);
  }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) {
      this->Finish(grpc::Status::OK);
      return;
    }
    response_.Clear();
    response_.set_valid_host(request_.host());
    *response_.mutable_original_request() = request_;
    Answer();
    this->StartWrite(&response_);
  }
  void OnWriteDone(bool ok) override {
    if (ok) {
      this->StartRead(&request_);
    } else {
      this->Finish(grpc::Status::CANCELLED);
    }
  }
  void OnDone() override { delete this; }

  void Answer() {
    const DescriptorPool& pool = *DescriptorPool::generated_pool();
    switch (request_.message_request_case()) {
      case Request::kListServices:
        for (const std::string& service : services_) {
          response_.mutable_list_services_response()->add_service()->set_name(service);
        }
        return;
      case Request::kFileByFilename:
        return AnswerFile(pool.FindFileByName(request_.file_by_filename()),
                          request_.file_by_filename());
      case Request::kFileContainingSymbol:
        return AnswerFile(pool.FindFileContainingSymbol(request_.file_containing_symbol()),
                          request_.file_containing_symbol());
      case Request::kFileContainingExtension:
        return AnswerFile(nullptr, request_.file_containing_extension().containing_type());
      case Request::kAllExtensionNumbersOfType:
        // The contract has no extensions: a known type has none, an unknown one is not found.
        if (pool.FindMessageTypeByName(request_.all_extension_numbers_of_type()) == nullptr) {
          return AnswerFile(nullptr, request_.all_extension_numbers_of_type());
        }
        response_.mutable_all_extension_numbers_response()->set_base_type_name(
            request_.all_extension_numbers_of_type());
        return;
      default:
        response_.mutable_error_response()->set_error_code(grpc::StatusCode::INVALID_ARGUMENT);
        response_.mutable_error_response()->set_error_message("message_request: expected one");
    }
  }

  void AnswerFile(const FileDescriptor* file, const std::string& asked) {
    if (file == nullptr) {
      response_.mutable_error_response()->set_error_code(grpc::StatusCode::NOT_FOUND);
      response_.mutable_error_response()->set_error_message("not found: " + asked);
      return;
    }
    response_.mutable_file_descriptor_response();
    std::set<const FileDescriptor*> seen;
    AddFile(file, &seen);
  }

  void AddFile(const FileDescriptor* file, std::set<const FileDescriptor*>* seen) {
    if (!seen->insert(file).second) return;
    google::protobuf::FileDescriptorProto proto;
    file->CopyTo(&proto);
    response_.mutable_file_descriptor_response()->add_file_descriptor_proto(
        proto.SerializeAsString());
    for (int i = 0; i < file->dependency_count(); ++i) AddFile(file->dependency(i), seen);
  }

  const std::vector<std::string>& services_;
  Request request_;
  Response response_;
};

template <typename Base, typename Request, typename Response>
class ReflectionRpc final : public Base {
 public:
  explicit ReflectionRpc(std::vector<std::string> services) : services_(std::move(services)) {}

 private:
  grpc::ServerBidiReactor<Request, Response>* ServerReflectionInfo(
      grpc::CallbackServerContext*) override {
    return new ReflectionStream<Request, Response>(services_);
  }
  const std::vector<std::string> services_;
};

}  // namespace

std::vector<std::unique_ptr<grpc::Service>> MakeReflectionServices(
    const std::vector<std::string>& services) {
  namespace v1 = grpc::reflection::v1;
  namespace v1alpha = grpc::reflection::v1alpha;
  std::vector<std::unique_ptr<grpc::Service>> made;
  made.push_back(
      std::make_unique<ReflectionRpc<v1::ServerReflection::CallbackService,
                                     v1::ServerReflectionRequest, v1::ServerReflectionResponse>>(
          services));
  made.push_back(std::make_unique<ReflectionRpc<v1alpha::ServerReflection::CallbackService,
                                                v1alpha::ServerReflectionRequest,
                                                v1alpha::ServerReflectionResponse>>(services));
  return made;
}

}  // namespace clusterkv::cache_service
